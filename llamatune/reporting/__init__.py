"""One page about one run or several: what they did, how they differ, and what went wrong."""
