"""What models exist: families, their sources, and the hubs that files come from."""
