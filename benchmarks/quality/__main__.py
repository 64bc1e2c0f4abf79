"""The evidence: `python -m benchmarks.quality work|plan|costs|page`; see `benchmarks/quality/README.md`."""

import argparse

from benchmarks.quality.costs import measure_costs
from benchmarks.quality.page import write_page
from benchmarks.quality.planning import print_plan
from benchmarks.quality.queue import work
from benchmarks.quality.table import table_names


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.quality", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    to_work = commands.add_parser("work", help="make the trials that are missing; started again, it goes on")
    to_work.add_argument("--workers", type=int, default=1, help="trials at a time, a thread each")
    to_work.add_argument("--minutes", type=float, help="begin no trial after so many")
    to_work.add_argument("--tuning", action="store_true", help="leave the final trials, on test rows, for later")
    to_plan = commands.add_parser("plan", help="the trials of each table, what they take, and how many are made")
    commands.add_parser("page", help="write the tables and plots of docs/evidence.md from what is known")
    to_measure = commands.add_parser("costs", help="what a training step of each method of a table costs")
    to_measure.add_argument("table", nargs="?", default="costs", choices=table_names(), metavar="TABLE")
    to_measure.add_argument("--repeats", type=int, default=15)
    for command in (to_work, to_plan):
        command.add_argument("tables", nargs="*", default=table_names(), metavar="TABLE", help="all, if not given")
    options = parser.parse_args()
    if options.command == "work":
        work(options.tables, options.workers, options.minutes, options.tuning)
    elif options.command == "costs":
        print(measure_costs(options.table, options.repeats))
    elif options.command == "page":
        write_page()
    else:
        print_plan(options.tables)


if __name__ == "__main__":
    main()
