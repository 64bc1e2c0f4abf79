"""Text from a base and its adapters, token by token: what the terminal chat and the HTTP endpoint stand on."""
