"""One file a verb: parse, call one core function, print."""
