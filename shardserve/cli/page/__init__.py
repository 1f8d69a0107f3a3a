"""The page that `shardserve inspect --html` writes."""
