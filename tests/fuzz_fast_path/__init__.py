"""Fuzzes the fast path: heads against aiohttp's own parser, whole connections against what it sees.

``python -m tests.fuzz_fast_path --minutes 10 [--seed N]`` runs for as long as asked, prints how
many examples it tried, and ends with the smallest failing example where there is one.
``tests/test_fast_path_fuzz.py`` runs the same properties for some seconds.

The oracle is aiohttp's parser, fed one byte at a time. The fast path must read the same requests,
whichever path answers them and however the bytes were split. Where the parser refuses to go on, the
refusal must be the last answer.
"""
