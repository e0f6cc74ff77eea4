"""Programs of ours that run as a replica's process, where a library brings no server."""
