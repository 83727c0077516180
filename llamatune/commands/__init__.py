"""Verbs of the command line, one file each: call one core function, print its result."""
