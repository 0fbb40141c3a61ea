"""What each node's low precision costs, and the fewest to leave alone."""
