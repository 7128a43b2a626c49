"""What Ray Tune costs: eight trainings of one network in a search, two at a time.

    python -m studies.overhead    # two CPU cores with nothing else to do; a few minutes

Without any cost they would take four times as long as one of them. What a training takes is what
its log.csv says; to make its process and its network, to write its files and to draw its curves is
cost, and so is all that Ray Tune does between the first trial and the last. docs/search.md has the
result.
"""

import script

import tempfile
import time
from contextlib import chdir

import search
from trials import Search

ONE = {  # an epoch of the digits takes some seconds
    "num_stages": (3,),
    "same_blocks": (True,),
    "num_blocks": (3,),
    "conv_kernel": (3,),
    "skip_kernel": (1,),
    "pooled_size": (1,),
    "c1": (16,),
}


def main(_args: list[str]) -> None:
    """Run the search and print both times."""
    fit, spent = search.fit, []

    def timed_fit(*args: object) -> int:
        start = time.perf_counter()
        received = fit(*args)
        spent.append(time.perf_counter() - start)
        return received

    search.fit = timed_fit  # without the start of Ray
    options = Search(name="overhead", num_samples=8, epochs=5, grace_epochs=5)
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        rows = search.run_search(options, "demo", ONE)
    seconds = [row["seconds"] for row in rows]
    ideal = sum(seconds) / 2
    print(
        f"{len(rows)} trials of {min(seconds):.1f} to {max(seconds):.1f} s, two at a time:"
        f" {spent[0]:.1f} s, {spent[0] / ideal:.2f} times the {ideal:.1f} s of training"
    )


if __name__ == "__main__":
    script.run_script(main)
