"""`XLA_FLAGS=$(python -m lorajax.environment)`: the flags to run programs under, with the guard."""

from lorajax.environment import guard

if __name__ == "__main__":
    print(guard())
