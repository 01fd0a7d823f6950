"""`Video` reads a video file or a camera frame by frame, and `VideoWriter` writes a video file.

PyAV (BSD-3-Clause) does both, in the extra `video`. Unlike OpenCV it tells a damaged video from one that ends, and its
wheels write H.264, which browsers show.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from .words import counted

SUFFIXES = {
    *(".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".flv"),
    ".3gp",
}
# How FFmpeg calls the cameras of a system, and the name that it has for the camera of an index.
CAMERAS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}"), "win32": ("dshow", "video={}")}
TICKS = 60_000  # a second has so many in a video that is written; MPEG-4 knows at most 65,535
DEFAULT_RATE = Fraction(25)  # frames per second, where a source does not tell its own


class Video:
    """A video is a file or a camera that can be read once or several times.

    Args:
        name: path of the file, or what messages call the camera.
        camera: index of the camera; None is a file.

    Attributes:
        rate: frames per second, known as soon as `read` has given a frame; the mean, where it varies.
        seconds: time of the frame that `read` gave last, after the first one.

    Raises:
        ImportError: PyAV is not installed.
    """

    def __init__(self, name: str, camera: int | None = None):
        load_av()
        self.name, self.camera, self.rate, self.seconds = name, camera, DEFAULT_RATE, 0.0

    def read(self) -> Iterator[np.ndarray]:
        """Decode one frame after the other, uint8 [H,W,3] RGB, upright as the video's rotation says.

        Raises:
            ValueError: there is no such file or camera, it is no video, or it is damaged or cut off; the frames that
                can be decoded have been given before.
        """
        av, number, damaged, end, first = load_av(), 0, 0, 0.0, None
        try:
            with self._open(av) as container:
                if not container.streams.video:
                    raise ValueError("it has no picture, only sound")
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"  # several cores decode
                rate = stream.average_rate or DEFAULT_RATE
                self.rate = Fraction(rate.numerator, rate.denominator)  # PyAV has a class of its own since version 19
                for packet in container.demux(stream):
                    damaged += packet.is_corrupt
                    try:
                        decoded = packet.decode()
                    except av.InvalidDataError:
                        damaged += 1
                        continue
                    for frame in decoded:
                        damaged += frame.is_corrupt
                        if frame.pts is None:
                            self.seconds += float(1 / self.rate) if number else 0.0
                        else:
                            first = frame.pts if first is None else first
                            self.seconds = float((frame.pts - first) * stream.time_base)
                        yield np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                        number += 1
                        start = stream.start_time or 0
                        end = float(((frame.pts or start) + (frame.duration or 0) - start) * stream.time_base)
                length = _length(container, stream)
            if not number:
                raise ValueError("it has no frames")
            if damaged:
                raise ValueError(counted(damaged, "frame is damaged", "frames are damaged"))
            if length - end > max(2.0, length / 10):
                raise ValueError(f"it ends after {end:.1f} of {length:.1f} seconds")
        except (av.FFmpegError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            where = f"{counted(number, 'frame is used', 'frames are used')}; " if number else ""
            raise ValueError(f"{self.name}: cannot read the video: {where}{reason}") from error

    def _open(self, av: ModuleType) -> Any:
        if self.camera is None:
            # "file:" and the list of protocols keep a name or a playlist from reaching into the network
            return av.open(f"file:{self.name}", options={"protocol_whitelist": "file"})
        if sys.platform not in CAMERAS:
            raise ValueError(f"cameras of {sys.platform} cannot be read")
        kind, address = CAMERAS[sys.platform]
        index: int | str = self.camera
        if kind == "dshow":  # Windows gives cameras names only
            cameras = [x.name for x in av.enumerate_input_devices(kind) if "video" in x.media_types]
            if self.camera >= len(cameras):
                raise ValueError(f"this machine has {counted(len(cameras), 'camera')}")
            index = cameras[self.camera]
        return av.open(address.format(index), format=kind)


class VideoWriter:
    """A video writer makes an MP4 file that can be played up to its last second even if the process is killed.

    Args:
        path: file to write; what is there is replaced.
        rate: frames per second.

    Raises:
        OSError: the file cannot be written; also from the methods.
    """

    def __init__(self, path: Path, rate: Fraction):
        av = load_av()
        path.unlink(missing_ok=True)  # a link is replaced, not followed
        self.av, self.rate, self.ticks = av, rate, -1
        self.stream: Any = None
        options = {"movflags": "frag_keyframe+empty_moov", "flush_packets": "1"}  # each second is on the disk at once
        self.container = av.open(f"file:{path}", "w", format="mp4", options=options)

    def write(self, picture: np.ndarray, seconds: float | None = None) -> None:
        """Append a frame, uint8 [H,W,3] RGB, to be shown after `seconds`, or if that is None, by the rate.

        All frames have the size of the first, which they are resized to.
        """
        height, width = picture.shape[:2]
        picture = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")  # H.264 wants even sides
        if self.stream is None:
            # builds of FFmpeg without x264 have the older MPEG-4 at least
            codec = "libx264" if "libx264" in self.av.codecs_available else "mpeg4"
            self.stream = self.container.add_stream(codec, rate=self.rate, options={"preset": "veryfast", "bf": "0"})
            self.stream.time_base = self.stream.codec_context.time_base = Fraction(1, TICKS)
            self.stream.height, self.stream.width = picture.shape[:2]
            self.stream.pix_fmt = "yuv420p"
            self.stream.gop_size = max(1, round(self.rate))  # a second
        frame = self.av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame = frame.reformat(self.stream.width, self.stream.height)
        due = self.ticks + round(TICKS / self.rate) if seconds is None else round(seconds * TICKS)
        frame.pts = self.ticks = max(due, self.ticks + 1)
        frame.time_base = Fraction(1, TICKS)
        self._encode(frame)

    def close(self) -> None:
        """Write what is left, and end the file."""
        try:
            if self.stream is not None:
                self._encode(None)
        finally:
            self.container.close()

    def _encode(self, frame: Any) -> None:
        assert self.stream is not None
        for packet in self.stream.encode(frame):
            self.container.mux(packet)


def _length(container: Any, stream: Any) -> float:
    """Return how many seconds the pictures of a file last, as far as its header says; 0 otherwise."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    alone = len(container.streams) == 1 and container.duration  # with sound, the sound may last longer
    return container.duration / 1_000_000 if alone else 0.0  # microseconds


def load_av() -> ModuleType:
    """Import PyAV. Raises `ImportError`, which says how to install it."""
    try:
        import av
    except ImportError as error:
        raise ImportError("videos and cameras need PyAV: pip install 'vovnet_zoo[video]'") from error
    return av
