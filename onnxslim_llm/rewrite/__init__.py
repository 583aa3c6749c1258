"""How graphs are changed: passes, rewrite rules, the matcher and pipelines. Knows no trick itself."""
