"""The door: who is served, where it runs, and how it is kept running."""
