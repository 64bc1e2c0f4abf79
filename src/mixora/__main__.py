"""`python -m mixora`: what torchrun and accelerate start, since they take a module."""

from mixora.cli import main

if __name__ == "__main__":
    main()
