"""Pictures with captions as users have them: folders, tables, COCO files and tar shards."""
