"""Every number in any report: latency, memory, size, energy, quality, and the distance from the physical limit."""
