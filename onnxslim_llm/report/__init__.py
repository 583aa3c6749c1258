"""What a compile did, for people: sizes by role, terminal tables, the self-contained report.html."""
