"""What is sent of a task vector, by density, energy or bits, and what of it is kept."""
