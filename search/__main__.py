"""`python -m search`; the package's docstring lists what it can do."""

import script
from search.run import main

if __name__ == "__main__":
    script.run_script(main)
