"""The `comfyfleet` command. Each command is a module; importing the group loads none of them."""
