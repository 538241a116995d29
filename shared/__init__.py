"""What gateway and worker share: settings, wire types, and everything that touches Redis."""
