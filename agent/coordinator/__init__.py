"""The coordinator: the service that agents and v1 clients ask who is primary."""
