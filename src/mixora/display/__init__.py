"""What people are shown: text as it stands, and the progress of long steps."""
