"""The shell commands of the READMEs, each block a script commands.N.sh in its order, with a few
steps instead of many. What needs a GPU, the hub or hours is marked there so and left out;
installing is .ci/run's."""
import re
from pathlib import Path

SHORTER = [  # what takes minutes, to seconds
    (r"--steps=\d+", "--steps=3"),
    (r"^((?!.*--steps).*?(mogrpo\.py|-m ablations\.\w+|torchrun \"\$@\"))", r"\1 --steps=2"),
    (r"for seed in 0 1 2", "for seed in 0"),
    (r"for round in 1 2 3 4", "for round in 1"),
    (r"-m bench\.intervals", "-m bench.intervals --trials=20"),
]
PAGES = ("README.md", "data/README.md", "ablations/README.md", "bench/README.md",
         "assets/real/README.md")
number = 0
for page in PAGES:
    for block in re.findall(r"^```sh\n(.*?)^```", Path(page).read_text(), re.S | re.M):
        script = "set -ex\n"
        for line in block.replace("\\\n", " ").splitlines():
            if not re.search(r"\[(GPU|hub|hours)|pip install -r", line):
                for pattern, shorter in SHORTER:
                    line = re.sub(pattern, shorter, line)
                script += line + "\n"
        number += 1
        Path(f"commands.{number}.sh").write_text(script)
