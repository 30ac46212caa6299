// What the page carries, unpacked when it is first needed; the inverse of packing.py.
const page = JSON.parse(document.getElementById("data").textContent);
const TYPES = { uint8: Uint8Array, uint16: Uint16Array, int32: Int32Array, float32: Float32Array };

async function unpack(element) {
  const packed = Uint8Array.from(atob(element.textContent), (letter) => letter.charCodeAt(0));
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
    arrays[name] = { values: new TYPES[type](together.buffer), width: shape.slice(1).reduce((a, b) => a * b, 1), shape };
    start += bytes;
  }
  return arrays;
}

const unpacked = new Map();
function part(id) {
  if (!unpacked.has(id)) unpacked.set(id, unpack(document.getElementById(id)));
  return unpacked.get(id);
}

// A layer's arrays, and where each latent's row in them is.
async function layerAt(place) {
  const arrays = await part(`layer-${place}`);
  arrays.rowOf ??= new Map(Array.from(arrays.latents.values, (latent, row) => [latent, row]));
  return arrays;
}

const row = (array, place) => array.values.subarray(place * array.width, (place + 1) * array.width);
