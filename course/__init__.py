"""The tools of Socratic Serving: everything that is neither a lab nor a test of one."""
