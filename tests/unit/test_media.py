"""Fetching media from a real HTTP server and from data: URLs, and decoding them."""

import asyncio
import base64
import io
import os
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image as PillowImage

from shared import data_url as data_urls
from shared.errors import UnbrokenError
from shared.protocol import MediaRef
from shared.settings import WorkerSettings
from tests.media_samples import data_url, encode, encode_video, movie, picture
from worker import media, media_guard
from worker.child import ChildDied, ChildPool
from worker.decoder import Job, Limits, decode, decode_image, sample

LIMITS = Limits(max_pixels=1_000_000, max_frames=16)


class MediaServer:
    """Serves `files` by path; a path may also redirect, hang, fail or lie about its size."""

    def __init__(self):
        self.files, self.seen = {}, []
        self.release = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.seen.append((self.path, self.headers["host"]))
                outer.answer(self)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    @property
    def port(self):
        """The port on loopback."""
        return self.server.server_address[1]

    def url(self, path):
        """The URL of a path."""
        return f"http://127.0.0.1:{self.port}{path}"

    def answer(self, request):
        """Answer one request."""
        name, _, argument = request.path.lstrip("/").partition("/")
        if name == "redirect":  # /redirect/3 takes three hops to /file
            left = int(argument) - 1
            self.head(request, 302, location=f"/redirect/{left}" if left else "/file")
        elif name == "to":
            self.head(request, 307, location=argument)
        elif name == "hang":
            self.head(request, 200, content_length="100")
            self.release.wait(20)
        elif name == "endless":
            self.head(request, 200)
            try:
                while not self.release.is_set():
                    request.wfile.write(b"x" * 65536)
            except OSError:
                pass
        elif name == "zipped":
            self.head(request, 200, content_encoding="gzip")
        elif name in self.files:
            self.head(request, 200, content_length=str(len(self.files[name])))
            request.wfile.write(self.files[name])
        else:
            self.head(request, 404)

    @staticmethod
    def head(request, status, **headers):
        """Send status and headers."""
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.flush()

    def close(self):
        """Stop serving; whatever hangs is released."""
        self.release.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def server():
    server = MediaServer()
    server.files["file"] = encode(picture())
    yield server
    server.close()


def settings(**changes):
    changes = {"media_allowed_hosts": "127.0.0.1,localhost", "max_media_bytes": 100_000, **changes}
    return WorkerSettings(_env_file=None, **changes)


async def fetch(url, kind="image", **changes):
    return await media.fetch(MediaRef(kind, url), settings(**changes), "messages[0].content[1]")


async def refused(url, kind="image", **changes):
    with pytest.raises(UnbrokenError) as caught:
        await fetch(url, kind, **changes)
    assert caught.value.param == "messages[0].content[1]"
    assert "127.0.0.1" not in caught.value.message
    return caught.value


async def test_a_file_is_fetched(server):
    """An http URL gives the file's bytes."""
    assert await fetch(server.url("/file")) == server.files["file"]


async def test_a_named_host_is_asked_under_its_name(server):
    """The connection goes to the resolved address, but the Host header keeps the URL's name."""
    url = f"http://localhost:{server.port}/file"
    assert await fetch(url) == server.files["file"]
    assert server.seen[-1] == ("/file", f"localhost:{server.port}")


async def test_proxies_of_the_environment_are_ignored(server, monkeypatch):
    """A proxy in the environment would see around the address check, and is not used."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    assert await fetch(server.url("/file")) == server.files["file"]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/file",
        "http://localhost:{port}/file",
        "http://2130706433:{port}/file",
        "http://[::1]:{port}/file",
        "http://[::ffff:127.0.0.1]:{port}/file",
        "http://169.254.169.254/latest/meta-data",
        "http://0.0.0.0:{port}/file",
        "http://10.0.0.1/",
    ],
)
async def test_private_hosts_are_refused(server, url):
    """By default no private, loopback, link-local or metadata address is asked, however written."""
    error = await refused(url.format(port=server.port), media_allowed_hosts="")
    assert error.code == "media_unreachable"
    assert server.seen == []


async def test_the_checked_address_is_the_one_asked(server, monkeypatch):
    """A host whose second DNS answer is private gains nothing: it is resolved once."""
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])
    monkeypatch.setattr(media_guard, "look_up", lambda host, port: next(answers))
    allowed = "rebound.example"
    url = f"http://rebound.example:{server.port}/file"
    assert await fetch(url, media_allowed_hosts=allowed) == server.files["file"]
    assert next(answers) == ["10.0.0.1"]


async def test_one_private_address_of_many_is_enough(server, monkeypatch):
    """A host with a public and a private address is refused: either could be asked."""
    monkeypatch.setattr(media_guard, "look_up", lambda host, port: ["8.8.8.8", "127.0.0.1"])
    error = await refused(f"http://both.example:{server.port}/file", media_allowed_hosts="")
    assert error.code == "media_unreachable"
    assert server.seen == []


async def test_a_public_host_cannot_redirect_inside(server, monkeypatch):
    """A redirect's target is checked as the first URL was."""
    inside = server.url("/to/http://127.0.0.2/file")
    error = await refused(inside, media_allowed_hosts="*,127.0.0.1")
    assert (error.code, error.message) == ("media_unreachable", media.UNREACHABLE)


@pytest.mark.parametrize(
    ("setting", "host", "address", "allowed"),
    [
        ("", "a.example", "8.8.8.8", True),
        ("", "a.example", "10.0.0.1", False),
        ("*", "a.example", "8.8.8.8", True),
        ("cdn.example", "a.example", "8.8.8.8", False),
        ("cdn.example", "CDN.example.", "10.0.0.1", True),
        ("*.example", "a.b.example", "10.0.0.1", True),
        ("*.example", "example", "8.8.8.8", False),
        ("*.example", "badexample", "8.8.8.8", False),
        ("10.0.0.0/8", "10.1.2.3", "10.1.2.3", True),
        ("10.0.0.0/8", "8.8.8.8", "8.8.8.8", False),
        ("*, 10.0.0.0/8", "8.8.8.8", "8.8.8.8", True),
        ("127.0.0.1", "2130706433", "127.0.0.1", True),
        ("*,cdn.example", "other.example", "127.0.0.1", False),
        ("fd00::/8", "x", "fd00::1", True),
    ],
)
def test_the_list_of_allowed_hosts(setting, host, address, allowed):
    """A list narrows the hosts, and opens those that it names."""
    assert media_guard.AllowedHosts(setting).allow(host, address) is allowed


def test_a_wrong_list_of_hosts_is_an_error():
    """An entry that is no host and no network is not silently ignored."""
    with pytest.raises(ValueError, match="no host and no network"):
        media_guard.AllowedHosts("10.0.0.0/99")


async def test_blocked_and_unreachable_look_the_same(server):
    """Nothing tells a private host from a closed port, an unknown name, or silence."""
    blocked = await refused(server.url("/file"), media_allowed_hosts="")
    closed = await refused("http://127.0.0.1:9/x")
    unknown = await refused("http://no-such-host.invalid/x")
    silent = await refused(server.url("/hang"), media_timeout_seconds=0.3)
    errors = (blocked, closed, unknown, silent)
    assert len({(error.code, error.message) for error in errors}) == 1


async def test_passwords_in_urls_are_refused(server):
    """A URL with a user name or password is invalid, and asks nobody."""
    error = await refused(f"http://user:pass@127.0.0.1:{server.port}/file")
    assert error.code == "invalid_media"
    assert server.seen == []


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://example.org/x", "gopher://x/"])
async def test_only_http_is_followed(server, target):
    """Neither a URL nor a redirect may leave http and https."""
    assert (await refused(target)).code == "invalid_media"
    assert (await refused(server.url(f"/to/{target}"))).code == "invalid_media"


async def test_redirects_are_followed_three_times(server):
    """Three redirects are followed, relative ones too; a fourth is an error."""
    assert await fetch(server.url("/redirect/3")) == server.files["file"]
    assert (await refused(server.url("/redirect/4"))).code == "media_unreachable"


@pytest.mark.parametrize("path", ["/file", "/endless"])
async def test_the_size_limit_holds(server, path):
    """A file over the limit is refused, whether or not the server tells its length."""
    server.files["file"] = bytes(50_000)
    error = await refused(server.url(path), max_media_bytes=40_000)
    assert error.code == "request_too_large"


async def test_compressed_answers_are_refused(server):
    """Compression that was not asked for could unpack to anything."""
    assert (await refused(server.url("/zipped"))).code == "media_unreachable"


async def test_a_server_that_hangs_costs_the_timeout(server):
    """A server that stops in the middle is given up after the timeout."""
    error = await refused(server.url("/hang"), media_timeout_seconds=0.3)
    assert error.code == "media_unreachable"


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x", "http://no-such-host.invalid/x"])
async def test_an_unreachable_host_is_an_error(url):
    """A closed port and an unknown name are both unreachable media."""
    assert (await refused(url)).code == "media_unreachable"


@pytest.mark.parametrize(
    "url", ["http://xn--/", "http://", "http://[::1", "http://a:0/", "http://a:99999/"]
)
async def test_a_url_that_is_none_is_the_clients_fault(url):
    """A URL that cannot be parsed, its host included, is invalid media."""
    assert (await refused(url)).code == "invalid_media"


async def test_a_missing_file_is_an_error(server):
    """A status other than 200 is named."""
    error = await refused(server.url("/missing"))
    assert (error.code, "404" in error.message) == ("media_unreachable", True)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("64:ff9b::808:808", True),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b:1::808:808", False),
        ("::ffff:0:127.0.0.1", False),
        ("2002:7f00:1::", False),
        ("::ffff:10.0.0.1", False),
        ("::127.0.0.1", False),
        ("100.64.0.1", False),
        ("168.63.129.16", False),
        ("224.0.0.1", False),
        ("fe80::1%eth0", False),
        ("fd00:ec2::254", False),
        ("nonsense", False),
    ],
)
def test_public_addresses(address, public):
    """Only globally routed addresses are public, also inside of IPv6 transition formats."""
    assert media_guard.is_public(address) is public


async def test_data_urls_are_read():
    """Standard base64 with its padding is decoded, however long."""
    for size in (1, 2, 3, 1_600_000):
        data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
        url = data_url(data, "image/PNG;name=a.png")
        assert await fetch(url, max_media_bytes=2_000_000) == data


@pytest.mark.parametrize(
    "body",
    [
        "@@@=",
        "",
        "AAA",
        "AA\nAA",
        "AAAA AAAA",
        "AA==AAAA",
        "A===",
        "=AAA",
        "AA-_",
        "AAA%3d",
        "ÄAAA",
    ],
)
async def test_base64_is_read_strictly(body):
    """No white space, percent signs, other alphabets, missing padding or data behind it."""
    assert (await refused(f"data:image/png;base64,{body}")).code == "invalid_media"


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png,AAAA",
        "data:;base64",
        "data:;base64,AAAA",
        "data:text/html;base64,AAAA",
        "data:image/png;base64;x,AAAA",
        f"data:image/png{';a=b' * 50};base64,AAAA",
        "data://host/image/png;base64,AAAA",
        "DATA:image/png;BASE32,AAAA",
    ],
)
async def test_bad_data_urls_are_invalid(url):
    """A data: URL of another form, or without base64, is invalid media."""
    assert (await refused(url)).code == "invalid_media"


async def test_frames_are_bounded_in_number():
    """A list of more frames than anybody needs is refused before it is decoded."""
    url = "data:video/jpeg;base64," + ",".join(["AAAA"] * 1025)
    assert "frames" in (await refused(url, kind="video")).message


@hypothesis.given(
    st.text(alphabet=st.characters(max_codepoint=0x250), max_size=60),
    st.sampled_from(["data:", "data:image/png;base64,", "data:video/jpeg;base64,", "data:image/"]),
)
def test_any_data_url_is_read_or_refused(rest, head):
    """Whatever follows `data:`, it is decoded, or refused with the one error."""
    try:
        parsed = data_urls.split(head + rest, frames=True)
        decoded = [data_urls.decode(text) for text in parsed.texts]
    except data_urls.DataUrlError:
        return
    again = ",".join(base64.b64encode(data).decode() for data in decoded)
    assert len(again) == len((head + rest).split(";base64,", 1)[1])


async def test_a_large_data_url_is_too_large():
    """The size limit holds for data: URLs as well."""
    url = data_url(bytes(2000), "image/png")
    assert (await refused(url, max_media_bytes=1024)).code == "request_too_large"


async def test_a_list_of_frames_is_split():
    """`data:video/jpeg` is a list of frames for a video, and one file for an image."""
    frames = [encode(picture(color=(n, 0, 0)), "JPEG") for n in (10, 200)]
    url = "data:video/jpeg;base64," + ",".join(base64.b64encode(f).decode() for f in frames)
    assert await fetch(url, kind="video") == frames


def test_content_hashes_tell_media_apart():
    """Equal bytes have equal hashes; a list of frames is not its concatenation."""
    assert media.content_hash(b"ab") == media.content_hash(b"ab")
    hashes = [media.content_hash(data) for data in (b"ab", [b"ab"], [b"a", b"b"], [b"b", b"a"])]
    assert len(set(hashes)) == 4


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_lossless_images_are_read_exactly(kind):
    """PNG and lossless WebP give their very pixels."""
    assert np.array_equal(decode_image(encode(picture(), kind), 10_000), picture())


def test_jpeg_images_are_read():
    """A JPEG gives nearly its pixels."""
    array = decode_image(encode(picture(), "JPEG", quality=95), 10_000)
    assert np.abs(array.astype(int) - picture()).mean() < 3


def test_exif_orientation_is_applied():
    """A photo taken sideways is turned upright."""
    exif = PillowImage.Exif()
    exif[0x0112] = 6  # turn a quarter to the right
    array = decode_image(encode(picture(96, 64), "PNG", exif=exif.tobytes()), 10_000)
    assert np.array_equal(array, np.rot90(picture(96, 64), -1))


def test_transparency_becomes_white():
    """Transparent pixels are laid on white."""
    transparent = np.dstack([picture(), np.zeros((64, 96), np.uint8)])
    assert (decode_image(encode(transparent), 10_000) == 255).all()


def test_sixteen_bit_grey_is_scaled():
    """16-bit grey keeps its shades instead of turning white."""
    array = decode_image(encode(np.full((8, 8), 257 * 100, np.uint16)), 10_000)
    assert (array == 100).all()
    assert array.shape == (8, 8, 3)


def test_an_animation_gives_its_first_frame():
    """Of an animated image the first frame is taken."""
    later = [PillowImage.fromarray(picture(color=(0, 0, 200)))]
    data = encode(picture(), "WEBP", save_all=True, append_images=later)
    assert np.array_equal(decode_image(data, 10_000), picture())


def test_pixels_are_checked_before_decoding():
    """A small file of a huge picture is refused by its header."""
    data = encode(np.zeros((2000, 2000, 3), np.uint8))
    with pytest.raises(UnbrokenError, match="2000 x 2000 pixels") as caught:
        decode_image(data[:200], 1_000_000)  # there is no more than the header to read
    assert caught.value.code == "invalid_media"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_images_are_invalid(kind):
    """An image that ends too early is invalid media."""
    data = encode(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8), kind)
    for size in (len(data) // 2, 10):
        with pytest.raises(UnbrokenError, match="corrupt"):
            decode_image(data[:size], 10_000)


@pytest.mark.parametrize("data", [b"no image", b"<svg></svg>", encode(picture(), "TIFF")])
def test_other_formats_are_invalid(data):
    """What is no PNG, JPEG, WebP or GIF is not tried with other decoders."""
    with pytest.raises(UnbrokenError, match="not a PNG"):
        decode_image(data, 10_000)


@pytest.mark.parametrize("container", ["mp4", "webm"])
def test_videos_are_sampled_evenly_with_their_times(container):
    """Frames come from the first to the last, each with its true time and the right picture."""
    frames = movie(48)
    video = decode(Job("video", (encode_video(frames, container, fps=8),)), LIMITS)
    assert video.frames.shape == (16, 64, 96, 3)
    assert (video.indices[0], video.indices[-1], video.total_frames) == (0, 47, 48)
    assert video.fps == pytest.approx(8)
    assert video.times == pytest.approx([index / 8 for index in video.indices])
    for index, frame in zip(video.indices, video.frames, strict=True):
        assert np.abs(frame.astype(int) - frames[index]).mean() < 12


def test_a_short_video_gives_all_its_frames():
    """A video with fewer frames than the limit is not sampled."""
    assert decode(Job("video", (encode_video(movie(5)),)), LIMITS).indices == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("width", [16, 24, 48, 50, 72, 86])
def test_videos_of_any_width_are_read(width):
    """Widths at which decord mistakes padding for channels are read like others."""
    frames = movie(4, width, 34)
    video = decode(Job("video", (encode_video(frames),)), LIMITS)
    assert video.frames.shape == (4, 34, width, 3)
    assert np.abs(video.frames.astype(int) - np.stack(frames)).mean() < 12


def test_large_videos_are_scaled_down():
    """Frames are scaled so that all of them keep to the pixel limit, in their proportions."""
    video = decode(Job("video", (encode_video(movie(8)),)), Limits(12_288, 8))
    assert video.frames.shape == (8, 32, 48, 3)


@pytest.mark.parametrize(
    "data",
    [
        encode_video(movie(8))[:700],
        b"\0\0\0\x20ftypisom" + bytes(500),
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        encode(picture()),
        b"",
    ],
)
def test_broken_videos_are_invalid(data):
    """A truncated or empty video, a playlist and an image are all invalid media."""
    with pytest.raises(UnbrokenError) as caught:
        decode(Job("video", (data,)), LIMITS)
    assert caught.value.code == "invalid_media"


def test_frames_are_a_video_of_one_frame_a_second():
    """A list of frames is sampled like a video, its frames a second apart."""
    files = tuple(encode(picture(color=(n, 0, 0))) for n in range(20))
    video = decode(Job("frames", files), Limits(1_000_000, 4))
    assert video.indices == (0, 6, 13, 19)
    assert video.times == (0.0, 6.0, 13.0, 19.0)
    assert [frame[32, 48, 0] for frame in video.frames] == [0, 6, 13, 19]


def test_frames_of_different_sizes_are_invalid():
    """Frames of one video must be of one size."""
    with pytest.raises(UnbrokenError, match="one size"):
        decode(Job("frames", (encode(picture()), encode(picture(32, 32)))), LIMITS)


def test_sampling_keeps_first_and_last():
    """Sampling is even, keeps both ends, and never repeats a frame."""
    assert sample(3, 16) == [0, 1, 2]
    assert sample(100, 3) == [0, 50, 99] or sample(100, 3) == [0, 49, 99]
    assert sample(100, 1) == [0]
    for total in range(1, 60):
        chosen = sample(total, 16)
        assert len(set(chosen)) == len(chosen) == min(total, 16)


async def test_the_decoder_child_decodes_and_survives_bad_input(capfd):
    """The child refuses broken files without ending, and nothing of them reaches the log."""
    pool = ChildPool("worker.decoder:create", (LIMITS,), timeout=20)
    await pool.start()
    pids = pool.pids
    broken = encode_video(movie(4), "webm")[:200]  # decord prints what it cannot open
    with pytest.raises(UnbrokenError):
        await pool.call(Job("video", (broken,)))
    assert (await pool.call(Job("video", (encode_video(movie(4)),)))).total_frames == 4
    assert pool.pids == pids
    os.kill(pids[0], signal.SIGSTOP)
    call = asyncio.ensure_future(pool.call(Job("image", (encode(picture()),))))
    await asyncio.sleep(0)
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(ChildDied):
        await call
    assert (await pool.call(Job("image", (encode(picture()),)))).array.shape == (64, 96, 3)
    await pool.close()
    assert capfd.readouterr() == ("", "")


async def test_a_picture_that_fills_the_memory_costs_itself_only():
    """A decoder's memory is bounded: what exceeds it is refused, and the rest goes on."""
    limits = Limits(max_pixels=200_000_000, max_frames=4, memory_bytes=2**27)
    pool = ChildPool("worker.decoder:create", (limits,), timeout=20)
    await pool.start()
    bomb = io.BytesIO()
    PillowImage.new("1", (12_000, 12_000)).save(bomb, "PNG")
    with pytest.raises((UnbrokenError, ChildDied)):
        await pool.call(Job("image", (bomb.getvalue(),)))
    assert (await pool.call(Job("image", (encode(picture()),)))).array.shape == (64, 96, 3)
    assert (await pool.call(Job("video", (encode_video(movie(4)),)))).total_frames == 4
    await pool.close()


def test_long_and_thin_pictures_are_refused():
    """A side may not be far longer than the other, in images and in frames."""
    thin = encode(np.zeros((1, 300, 3), np.uint8))
    for job in (Job("image", (thin,)), Job("frames", (thin,))):
        with pytest.raises(UnbrokenError) as caught:
            decode(job, LIMITS)
        assert "times" in caught.value.message
