"""What happened to a warehouse since it was opened: every distinct path has a number."""

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """What happened since open; every distinct path has a number."""

    matches: int = 0
    matched_blocks: int = 0
    asked_blocks: int = 0
    shortened_matches: int = 0  # the client may lease no more
    digest_mismatches: int = 0
    puts: int = 0
    published_blocks: int = 0
    present_blocks: int = 0
    collisions: int = 0
    failed_blocks: int = 0
    no_room_blocks: int = 0
    over_quota_blocks: int = 0
    worthless_blocks: int = 0  # not admitted: all that is held was worth more
    first_touch_blocks: int = 0  # not admitted: nobody had asked for them before
    worn_blocks: int = 0  # not admitted: the day's budget of writes is used up
    refused_puts: int = 0  # not one block fitted into the tenant's quota
    written_bytes: int = 0
    evicted_blocks: int = 0
    evicted_bytes: int = 0
    removed_blocks: int = 0
    erased_blocks: int = 0  # of these two: headers overwritten
    expired_blocks: int = 0  # of those evicted: their time to live was over, and nobody wanted room
    refused_sessions: int = 0  # not entered: there are too many
    touched_sessions: int = 0
    lost_touches: int = 0  # what they said of sessions, not what they said of uses
    forgotten_sessions: int = 0
    unkept_classes: int = 0  # could not be written to the devices: a rebuild would lose them
    holes: int = 0
    moved_blocks: int = 0
    moved_bytes: int = 0
    replaced_blocks: int = 0  # stored anew, as the device they lay on is offline
    reports: int = 0
    mount_reads: int = 0
    mount_read_bytes: int = 0

    def count_put(
        self, *, published: int, present: int, collisions: int, failed: int, no_room: int,
        over_quota: int, written_bytes: int,
    ) -> None:  # fmt: skip
        """Add what became of the blocks of one put."""
        self.puts += 1
        self.published_blocks += published
        self.present_blocks += present
        self.collisions += collisions
        self.failed_blocks += failed
        self.no_room_blocks += no_room
        self.over_quota_blocks += over_quota
        self.written_bytes += written_bytes
