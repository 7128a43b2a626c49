"""`python -m search`; the package's docstring lists what it can do."""

if __name__ == "__main__":
    from engine.script import run_script

    run_script("search.run")
