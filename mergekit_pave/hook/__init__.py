"""How mergekit comes to know us. What is loaded for everybody who uses torch or mergekit is in this room, and is light."""
