"""The stock in Redis: keys, scripts and the batcher. Lua decides, Python translates."""
