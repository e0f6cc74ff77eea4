"""Where processes run: this machine, for now."""
