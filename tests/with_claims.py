"""The command line as on a disk that other machines may use, where locks are backed by claims."""

from outliermerge.cli.main import main as cli
from outliermerge.output import claims


def main(arguments):
    """Run the command line where every disk may be shared."""
    claims.is_own_disk = lambda folder: False
    return cli(arguments)
