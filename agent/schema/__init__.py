"""Every datum that crosses the program's border, declared once: settings and the API's JSON."""
