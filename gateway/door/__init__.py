"""The fast way in: easy requests pass from socket to socket, and all others to the plain route."""
