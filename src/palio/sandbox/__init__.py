"""Confinement of what teams hand in to be run. docs/security.md says what it promises.

room         what a program sees and may use, as bubblewrap's arguments
gpu          the one GPU, seen from outside
gpu_libraries  its driver's libraries, for images
seccomp      system calls it has no business with
process      a program running in its room, watched, and ended with all it started
handed_in    files that come from a team: plain, inside their folder, no pickles, no code
door         sockets into the network of a confined server
gateway      HTTP on our loopback in front of it: replies of bounded size and time
server       a team's server: files or image → room → door → gateway
image        a container image as a folder
archive      the image as a file: digests, config, layers
unpack       layers into a folder, and nothing outside it
build        a Dockerfile into an image, by buildah in a room of its own
build_log    why that failed
death        why a server ended
doctor       whether this machine can confine, run images and build them, and what is lost if not
"""
