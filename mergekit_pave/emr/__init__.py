"""What EMR-Merging keeps for each model, and the models made of it again."""
