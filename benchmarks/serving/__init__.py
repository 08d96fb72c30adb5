"""What clients get of real nodes with real llama.cpp: slots, spreading, caches, hedging, overload."""
