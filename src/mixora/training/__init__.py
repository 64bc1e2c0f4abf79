"""Trainers that carry the auxiliary losses, the check of what reaches the routers, and the run from data to report."""
