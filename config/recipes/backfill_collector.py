"""Copies readings from a source that keeps them: ``backfill_collector.py SOURCE OUTPUT``.

It begins after the time that its predecessor has reported, and reports a time only when its data is on
disk. So nothing is missing after a takeover; what was written but not yet reported is written again.
A line of the source is ``TIME VALUE``, a line of the output ``TIME VALUE EPOCH``.
"""

import json
import os
import sys
import time
import urllib.request
from datetime import datetime
from pathlib import Path

POLL_S = 0.05


def report(moment: str) -> None:
    """Report up to when data was processed. One that is lost is made up for by the next."""
    url = os.environ["FAILOVER_PROBE_URL"] + "/data-processed"
    request = urllib.request.Request(url, json.dumps({"time": moment}).encode())
    request.add_header("Content-Type", "application/json")
    try:
        urllib.request.urlopen(request, timeout=1).close()
    except OSError as error:
        sys.stderr.write(f"not reported: {error}\n")


def main(source_file: Path, output_file: Path) -> None:
    """Copy until somebody stops it."""
    begin = os.environ["FAILOVER_LAST_DATA_PROCESSED_TIME"]
    begin_at = datetime.fromisoformat(begin) if begin else None
    with source_file.open("rb") as source, output_file.open("a") as output:
        while True:
            newest = None
            while (line := source.readline()).endswith(b"\n"):
                moment, value = line.decode().split()
                if begin_at is None or datetime.fromisoformat(moment) > begin_at:
                    output.write(f"{moment} {value} {os.environ['FAILOVER_EPOCH']}\n")
                    newest = moment
            source.seek(source.tell() - len(line))  # half a line: it is read again
            if newest is not None:
                output.flush()
                os.fsync(output.fileno())
                report(newest)
            time.sleep(POLL_S)


main(Path(sys.argv[1]), Path(sys.argv[2]))
