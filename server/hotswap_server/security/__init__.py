"""Who may call what: principals, keys, limits and TLS. Nothing here knows of engine or transport."""
