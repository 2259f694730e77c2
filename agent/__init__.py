"""Client failover: exactly one active copy of a program in a group of hosts."""

__version__ = "0.1.0"
