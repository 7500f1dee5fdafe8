"""Optional features, each in a package or module of its own. Only the modules of commands and `api` import them."""
