"""From inputs to the range of each tensor: what is watched, counted and concluded."""
