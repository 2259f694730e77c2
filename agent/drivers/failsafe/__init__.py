"""Questions between the members of a group, over the LAN, while the coordinator is away (docs/failsafe.md)."""
