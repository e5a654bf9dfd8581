"""Write kjv_excerpt.txt.gz: every third chapter of the King James Bible, one verse a line.

Needs Debian's packages bible-kjv and bible-kjv-text (4.38); run it in this folder. A chapter is its
heading ("Genesis 1") and its verses without their numbers; blank lines part the chapters.
"""

import gzip
import re
import subprocess
from pathlib import Path

EVERY = 3


def chapters() -> list[str]:
    printed = subprocess.run(
        ["bible", "-l100000", "gen1:1-rev22:21"], capture_output=True, text=True, check=True
    ).stdout
    found: list[list[str]] = []
    for line in filter(None, printed.splitlines()):
        verse = re.match(r"  \d+ +(.*)", line)
        if verse:
            found[-1].append(verse[1].strip())
        else:
            found.append([line.strip()])
    return ["\n".join(lines) + "\n" for lines in found]


if __name__ == "__main__":
    text = "\n".join(chapters()[::EVERY])
    packed = gzip.compress(text.encode("ascii"), compresslevel=9, mtime=0)
    Path("kjv_excerpt.txt.gz").write_bytes(packed)
    print(f"{len(text):,} characters, {len(packed):,} bytes packed")
