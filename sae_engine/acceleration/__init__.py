"""Objects of other libraries that keep their class and compute with ours, a module a library, :mod:`.switch` turns."""
