"""All decisions, as pure functions of state, input and time (R1-R9, R13-R18). No clock, no I/O."""
