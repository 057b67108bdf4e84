"""What is written of an answer, against h11 itself."""

from __future__ import annotations

import h11
import pytest

from toolchain.gateway.protocol import Pieces


@pytest.mark.parametrize("request_line", [b"GET / HTTP/1.1", b"GET / HTTP/1.0"])
@pytest.mark.parametrize("headers", [[], [("Content-Length", "9")]])
def test_an_answer_in_pieces_is_written_as_h11_writes_it(request_line: bytes, headers: list[tuple[str, str]]) -> None:
    def written(connection: h11.Connection) -> list[bytes | None]:
        found = []
        for _answer in range(2 if request_line.endswith(b"1") else 1):
            connection.receive_data(request_line + b"\r\nHost: a\r\n\r\n")
            connection.next_event()
            connection.next_event()
            found.append(connection.send(h11.Response(status_code=200, headers=headers, reason=b"OK")))
            found += [connection.send(h11.Data(data=data)) for data in (b"abc", b"", b"defghi")]
            found.append(connection.send(h11.EndOfMessage()))
            if request_line.endswith(b"1"):
                connection.start_next_cycle()
        return found

    assert written(Pieces(h11.SERVER)) == written(h11.Connection(h11.SERVER))


def test_a_piece_after_the_end_is_still_refused() -> None:
    connection = Pieces(h11.SERVER)
    connection.receive_data(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    connection.next_event()
    connection.next_event()
    connection.send(h11.Response(status_code=200, headers=[], reason=b"OK"))
    connection.send(h11.EndOfMessage())
    with pytest.raises(h11.LocalProtocolError):
        connection.send(h11.Data(data=b"abc"))
