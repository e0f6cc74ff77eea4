"""The catalogue that ships with us: JSON files, the facts that they are made from, and the tool that does it."""
