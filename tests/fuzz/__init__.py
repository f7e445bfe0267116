"""Attacks on the command line that are kept: damaged files (`damage`) and runs that are killed (`kills`)."""
