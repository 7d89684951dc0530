"""RELIABILITY.md says what the tests try and what the long runs found, and nothing else."""

import reliability


def test_the_document_is_what_tests_and_reports_say() -> None:
    assert reliability.DOCUMENT.read_text() == reliability.document(), (
        "write it anew: python tests/reliability.py"
    )
