// The page carries its data, unpacked when it is first needed; the inverse of packing.py.
async function unpack(id) {
  const packed = Uint8Array.from(atob(document.getElementById(id).textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const whole = new Uint8Array(await new Response(stream).arrayBuffer());
  const headerBytes = new DataView(whole.buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(whole.subarray(4, 4 + headerBytes)));
  const arrays = {};
  let start = 4 + headerBytes;
  for (const { name, type, shape, bytes } of header) {
    const planes = whole.subarray(start, start + bytes);
    const size = TYPES[type].BYTES_PER_ELEMENT;
    const count = bytes / size;
    const together = new Uint8Array(bytes);
    for (let plane = 0; plane < size; plane++) {
      for (let i = 0; i < count; i++) together[i * size + plane] = planes[plane * count + i];
    }
    arrays[name] = { values: new TYPES[type](together.buffer), width: shape.slice(1).reduce((a, b) => a * b, 1) };
    start += bytes;
  }
  return arrays;
}

const unpacked = once(unpack);
const source = {
  text: async () => (await unpacked("text")).ids,
  columns: (layer) => unpacked(`layer-${layer}`),
  async row(layer, place) {
    const { latents, silent, ...arrays } = await unpacked(`layer-${layer}`);
    return Object.fromEntries(Object.entries(arrays).map(([name, array]) => [name, row(array, place)]));
  },
};
